"""The laboratory: measurements, attacks and studies behind the claims in the documentation; not shipped."""
