"""Raw shards to token shards: an immutable plan, units that anyone may take, and a record that closes each of them."""
