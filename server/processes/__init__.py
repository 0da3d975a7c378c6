"""A server of several processes: a supervisor accepts connections, and passes each to a process that serves models."""
