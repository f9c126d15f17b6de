"""Small random networks of many families, from several exporters, with what must be found in them."""
