"""The hooks: the whole way from strategy file to exported model, with the small models of the harness."""
