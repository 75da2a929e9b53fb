"""Alembic's scripts: one file in ``versions`` per change of the schema. ``Database.migrate`` runs them.

``env.py`` is run by Alembic and can't be imported on its own.
"""
