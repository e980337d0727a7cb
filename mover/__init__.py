"""mover: moves one tenant's rows between live PostgreSQL databases."""
