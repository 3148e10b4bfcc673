"""What every experiment needs, whatever it measures. It knows no workload and no command."""
