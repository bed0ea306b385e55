"""What every endpoint that others call shares: keys, bodies, and errors in the caller's own format."""
