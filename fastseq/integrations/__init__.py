"""Other libraries' ways in: each module is imported only when asked for."""
