"""Other libraries, each imported only where it is used; nothing inside the package imports from here."""
