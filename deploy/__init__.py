"""Deployment and monitoring of the server."""
