"""Write the dashboards that Grafana is provisioned with: python -m de3.deploy.grafana.generate"""

from pathlib import Path

from grafana_foundation_sdk.builders import common as build_common
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from de3.deploy.grafana.panels import ALL_MODELS, DASHBOARDS, Dashboard, Panel

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="prometheus")

PanelBuilder = timeseries.Panel | stat.Panel | heatmap.Panel


def _lines(panel: Panel) -> timeseries.Panel:
    visual = (
        timeseries.Panel()
        .fill_opacity(30 if panel.kind == "stack" else 5)
        .show_points(common.VisibilityMode.NEVER)
        .tooltip(build_common.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
        .legend(
            build_common.VizLegendOptions()
            .show_legend(True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
        )
    )
    if panel.kind == "stack":
        visual.stacking(build_common.StackingConfig().mode(common.StackingMode.NORMAL))
    if panel.limit is not None:
        steps = [dashboard.Threshold(color="green"), dashboard.Threshold(value=panel.limit, color="red")]
        visual.thresholds(build.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps))
        style = build_common.GraphThresholdsStyleConfig()
        visual.thresholds_style(style.mode(common.GraphThresholdsStyleMode.DASHED))
    return visual


def _visual(panel: Panel) -> PanelBuilder:
    if panel.kind == "stat":
        last = build_common.ReduceDataOptions().calcs(["lastNotNull"])
        return stat.Panel().reduce_options(last).graph_mode(common.BigValueGraphMode.NONE)
    if panel.kind == "heatmap":
        color = heatmap.HeatmapColorOptions().scheme("Blues").min(0)
        axis = heatmap.YAxisConfig().axis_label("layer")
        return heatmap.Panel().calculate(False).color(color).y_axis(axis)
    return _lines(panel)


def _panel(panel: Panel) -> PanelBuilder:
    built = _visual(panel).title(panel.title).description(panel.description).unit(panel.unit)
    built = built.datasource(SOURCE).span(panel.width).height(panel.height)
    if panel.least is not None and panel.kind != "heatmap":
        built.min(panel.least)
    if panel.most is not None:
        built.max(panel.most)
    for i, query in enumerate(panel.queries):
        target = prometheus.Dataquery().ref_id(chr(ord("A") + i)).datasource(SOURCE)
        target.expr(query.expr).legend_format(query.legend)
        if panel.kind == "stat":
            target.instant()
        else:
            target.range()
        if panel.kind == "heatmap":
            target.format(PromQueryFormat.HEATMAP)
        built.with_target(target)
    return built


def make(board: Dashboard) -> str:
    """The JSON of a dashboard, as Grafana reads it."""
    model = (
        build.QueryVariable("model")
        .datasource(SOURCE)
        .query("label_values(de3_tau, model)")
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .all_value(ALL_MODELS)
        .current(dashboard.VariableOption(selected=True, text="All", value="$__all"))
        .multi(True)
    )
    others = build.DashboardLink("DE3").type(dashboard.DashboardLinkType.DASHBOARDS).tags(["de3"])
    definition = (
        build.Dashboard(board.title)
        .uid(board.uid)
        .tags(["de3"])
        .readonly()
        .timezone("browser")
        .time("now-30m", "now")
        .refresh("10s")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .with_variable(model)
        .link(others.keep_time(True).include_vars(True))
    )
    for panel in board.panels:
        if panel.row is not None:
            definition.with_row(build.Row(panel.row))
        definition.with_panel(_panel(panel))
    built = definition.build()
    for variable in built.templating.list_val or []:  # fields that only later schemas have
        variable.auto = variable.auto_min = variable.auto_count = None
    return JSONEncoder(sort_keys=True, indent=2).encode(built) + "\n"


def files() -> dict[Path, str]:
    """The content of each dashboard file, by path."""
    return {FOLDER / f"{board.uid.removeprefix('de3-')}.json": make(board) for board in DASHBOARDS}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text)
        print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
