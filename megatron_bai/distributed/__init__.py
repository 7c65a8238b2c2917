"""Say which device, which hosts and which group of ranks this process works with."""
