"""What alembic runs to bring a database to a version: on the connection that the store gives it."""

from alembic import context

from everalign.serving.store.records import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, version_table=VERSION_TABLE
)
with context.begin_transaction():
    context.run_migrations()
