"""The laboratory: measurements, attacks and studies that prove what the documentation claims; not shipped."""
