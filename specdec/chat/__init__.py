"""``specdec chat``: a streaming terminal client for any OpenAI-compatible server."""
