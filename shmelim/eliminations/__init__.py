"""The domain: elimination records, their store, the server that publishes them and the reader."""
