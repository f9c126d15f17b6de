"""What an engine's artifact differs in from the network: each pass takes a network and returns another one."""
