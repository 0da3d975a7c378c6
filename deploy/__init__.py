"""What runs the server and watches it."""
