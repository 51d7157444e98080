"""A small Hub for tests and the demo: storage, accounts and endpoints. Imports nothing but the standard library and
YAML."""
