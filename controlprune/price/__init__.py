"""The price of a resource, regulated: needs python-control where gains are designed."""
