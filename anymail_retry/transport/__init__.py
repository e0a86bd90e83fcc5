"""One HTTP call, several tries. Knows no Django model."""
