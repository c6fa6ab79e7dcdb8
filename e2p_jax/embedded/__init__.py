"""The small backbone that ships with the package; docs/backbone.md says how it was made."""
