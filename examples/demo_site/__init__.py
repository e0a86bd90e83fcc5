"""A small Django site whose mail survives a failing ESP."""
