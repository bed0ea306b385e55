"""What the hub is measured beside: servers that do the same to the same tables, and the client that calls them all."""
