"""Resources as functions of the widths: counted, modelled, measured."""
