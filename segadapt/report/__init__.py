"""The verb `report`: finished runs as one HTML page. data -> figures, gallery -> page."""
