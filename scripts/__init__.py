"""The command line: thin verbs over :mod:`pyra.tasks`, :mod:`pyra.adapters` and :mod:`pyra`."""
