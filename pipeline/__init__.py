from data_shards.untrusted.import_guard import refuse_shadowed

refuse_shadowed(__name__)
