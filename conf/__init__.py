"""Configuration: what may be set (schema.py), and a folder of YAML files for each group."""
