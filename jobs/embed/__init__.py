"""Train, export and serve click models whose embedding rows have lengths of their own."""
