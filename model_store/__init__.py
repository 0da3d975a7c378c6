"""The artifact format: schema, integrity, versions, lookup, and the opened model. No torch."""
