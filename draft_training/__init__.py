"""Makes draft heads: traces -> rows -> target features -> a head directory that vLLM loads. Never imports serving."""
