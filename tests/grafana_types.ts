// The types that Grafana publishes for its dashboards; test_dashboards.py appends ours as literals, for tsc to check.
// By path: the package does not export them by name.
import type { Dashboard } from "./node_modules/@grafana/schema/dist/esm/raw/dashboard/x/dashboard_types.gen";
import type { GraphFieldConfig } from "./node_modules/@grafana/schema/dist/esm/common/common.gen";
import type { Options as Timeseries } from "./node_modules/@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";
import type { Options as Heatmap } from "./node_modules/@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen";
import type { Options as Stat } from "./node_modules/@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";

// As JSON: members of enumerations are their values, and what a file leaves out Grafana fills in.
type Json<T> =
  T extends boolean ? T
  : T extends string ? `${T}`
  : T extends number ? (`${T}` extends `${infer N extends number}` ? N : never)
  : T extends (infer U)[] ? Json<U>[]
  : T extends object ? { [K in keyof T]?: Json<T[K]> }
  : T;
type Options = { timeseries: Timeseries; heatmap: Heatmap; stat: Stat };
