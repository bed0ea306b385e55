from django.db import migrations, models

import customers.models

# Under READ COMMITTED a transaction with a lower number may write a customer's next version: it got its number for
# something else, and waited for the customer.
TRIGGER = """
CREATE FUNCTION customers_change_tx() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.tx := greatest(NEW.tx, (
        SELECT tx FROM customers_customerchange WHERE customer_id = NEW.customer_id AND version = NEW.version - 1
    ));
    RETURN NEW;
END
$$;
CREATE TRIGGER customers_change_tx BEFORE INSERT ON customers_customerchange
    FOR EACH ROW WHEN (NEW.version > 1) EXECUTE FUNCTION customers_change_tx();
"""
NO_TRIGGER = """
DROP TRIGGER customers_change_tx ON customers_customerchange;
DROP FUNCTION customers_change_tx();
"""


def on_postgresql(sql):
    def run(apps, schema_editor):
        if schema_editor.connection.vendor == "postgresql":
            schema_editor.execute(sql)

    return run


class Migration(migrations.Migration):

    dependencies = [
        ("customers", "0002_mergerecord"),
    ]

    operations = [
        # First a constant, which PostgreSQL adds without writing the rows that are there.
        migrations.AddField(
            model_name="customerchange",
            name="tx",
            field=models.BigIntegerField(db_default=0, editable=False),
        ),
        migrations.AlterField(
            model_name="customerchange",
            name="tx",
            field=models.BigIntegerField(db_default=customers.models.CurrentTransaction(), editable=False),
        ),
        migrations.AddIndex(
            model_name="customerchange",
            index=models.Index(fields=["organization", "tx", "id"], name="change_order"),
        ),
        migrations.RunPython(on_postgresql(TRIGGER), on_postgresql(NO_TRIGGER), elidable=False),
    ]
