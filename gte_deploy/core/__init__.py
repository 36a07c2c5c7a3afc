"""Plain data and small tools that every other part may use."""
