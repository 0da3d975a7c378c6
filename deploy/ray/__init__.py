"""DE3 on Ray Serve: the application of `de3 serve`, as replicas that Ray starts, watches and scales."""
