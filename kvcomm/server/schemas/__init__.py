"""What goes over the wire, as pydantic models: their JSON schema is the OpenAPI document, so both are exact."""
