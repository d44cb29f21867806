"""What every operation stands on: devices, dispatch, dropout, grouping. Private."""
