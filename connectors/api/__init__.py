"""The hub's own endpoints, on top of the Links shape: `/api/v1/unified/` beyond what Links documents."""
