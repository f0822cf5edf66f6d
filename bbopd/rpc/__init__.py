"""The wire: messages, limits, the server of a teacher, and the client's channel to one."""
