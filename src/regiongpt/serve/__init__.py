"""The model as a web service: an API in OpenAI's shape, and a page to draw on."""
