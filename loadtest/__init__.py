"""Load generator, the servers that people run today, and reports. Speaks only HTTP to what it measures."""
