"""The command line. (The Pipeline/CLI author is writing this file and data_pipelines/request.py now; see the brief.)"""
