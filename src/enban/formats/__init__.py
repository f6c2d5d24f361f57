"""How bytes are arranged: each module or package here is one format."""
