"""What operators are given works: alerts, dashboards, charts."""
