"""Configurations that ship with the package: one folder a domain, and one file a mixer."""
