"""Run by Alembic inside the transaction of ``Database.migrate``."""

from alembic import context

from serve_app.database import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
