"""Load generator, peer servers and reports. It speaks only HTTP to the servers that it measures."""
