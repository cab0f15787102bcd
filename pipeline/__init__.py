from data_shards.untrusted.shadowed import refuse_shadowed

refuse_shadowed(__name__)
