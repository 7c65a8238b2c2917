"""The device, the hosts and the ranks that this process works with."""
