"""Train by reinforcement learning or supervision."""
