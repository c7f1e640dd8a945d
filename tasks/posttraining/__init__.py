"""Training after the first one on trl: on chats, on preferences and on rewards that can be verified."""
