//! The plots of a run: connects, denials, installation and update against the number of endpoints, us and the others.

use anyhow::{Result, anyhow};
use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::report::{Figure, Report};

/// Bounds of the picture.
const SIZE: (u32, u32) = (1000, 888);
/// Of that the list of who is who, below.
const LEGEND: u32 = 118;
/// What the text is set in: whatever the reader has.
const FONT: &str = "sans-serif";

/// Colours of a picture.
struct Theme {
    name: &'static str,
    text: RGBColor,
    grid: RGBColor,
    /// Of [`LINES`].
    lines: [RGBColor; 6],
}

/// Who has which line. Each has a mark of its own besides, for those who see colours otherwise.
const LINES: [&str; 6] = [
    "enforcer, ebpf",
    "enforcer, nftables",
    "nft: a set by hand",
    "nft: rules as the Go agent's",
    "iptables -m owner",
    "no rules, again",
];

/// For a page in light colours and one in dark ones; neither has a background of its own. The colours are those of
/// Okabe and Ito, lighter on dark.
const THEMES: [Theme; 2] = [
    Theme {
        name: "light",
        text: RGBColor(31, 35, 40),
        grid: RGBColor(216, 222, 228),
        lines: [
            RGBColor(0, 114, 178),
            RGBColor(213, 94, 0),
            RGBColor(0, 138, 100),
            RGBColor(168, 73, 130),
            RGBColor(150, 115, 0),
            RGBColor(110, 119, 129),
        ],
    },
    Theme {
        name: "dark",
        text: RGBColor(230, 237, 243),
        grid: RGBColor(61, 68, 77),
        lines: [
            RGBColor(86, 180, 233),
            RGBColor(255, 140, 60),
            RGBColor(50, 200, 150),
            RGBColor(224, 140, 190),
            RGBColor(225, 190, 60),
            RGBColor(145, 152, 161),
        ],
    },
];

/// One plot of the picture.
struct Panel {
    title: &'static str,
    /// The figure, and its unit.
    what: &'static str,
    unit: &'static str,
}

const PANELS: [Panel; 4] = [
    Panel {
        title: "TCP connect, allowed: ratio to no rules",
        what: "TCP connect, allowed",
        unit: "ratio",
    },
    Panel {
        title: "denial, as the caller sees it, µs",
        what: "denial, as its caller sees it",
        unit: "µs",
    },
    Panel {
        title: "install all: time of the command, ms",
        what: "installed, by its command",
        unit: "ms",
    },
    Panel {
        title: "protect one more: time of the command, ms",
        what: "one endpoint more, by its command",
        unit: "ms",
    },
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The pictures by the names of their files.
pub(super) fn all(report: &Report) -> Result<Vec<(String, String)>> {
    let mut all = Vec::new();
    for theme in &THEMES {
        let mut svg = String::new();
        draw(report, theme, &mut svg).map_err(|error| anyhow!("draw the plots: {error}"))?;
        svg.push('\n');
        all.push((format!("bench-{}.svg", theme.name), svg));
    }
    Ok(all)
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw(report: &Report, theme: &Theme, svg: &mut String) -> Drawn {
    let whole = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let (plots, legend) = whole.split_vertically(SIZE.1 - LEGEND);
    for (area, panel) in plots.split_evenly((2, 2)).iter().zip(&PANELS) {
        draw_panel(report, theme, (&whole, area), panel)?;
    }
    draw_legend(report, theme, &legend)?;
    whole.present()?;
    Ok(())
}

/// The endpoints and medians of one line.
fn line<'a>(report: &'a Report, panel: &'a Panel, who: &str) -> Vec<&'a Figure> {
    let of = |figure: &&Figure| figure.what == panel.what && figure.unit == panel.unit && figure.who == who;
    let mut line: Vec<&Figure> = report.figures.iter().filter(of).collect();
    line.retain(|figure| figure.endpoints.is_some() && figure.estimate.median > 0.0);
    line.sort_unstable_by_key(|figure| figure.endpoints);
    line
}

/// Into its area of the whole picture.
fn draw_panel(report: &Report, theme: &Theme, (whole, area): (&Area<'_>, &Area<'_>), panel: &Panel) -> Drawn {
    let lines: Vec<Vec<&Figure>> = LINES.iter().map(|who| line(report, panel, who)).collect();
    let medians = || lines.iter().flatten().map(|figure| figure.estimate.median);
    let lowest = medians().fold(f64::INFINITY, f64::min).min(1e6);
    let highest = medians().fold(0.0, f64::max).max(lowest * 10.0);
    let bottom = if panel.unit == "ratio" {
        0.9
    } else {
        decade(lowest, f64::floor)
    };
    let top = decade(highest, f64::ceil);

    let title = (FONT, 17).into_font().color(&theme.text);
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, title)
        .margin(12)
        .margin_right(34)
        .x_label_area_size(44)
        .y_label_area_size(58)
        .build_cartesian_2d((0.8_f64..130_000.0).log_scale(), (bottom..top).log_scale())?;
    let small = (FONT, 14).into_font().color(&theme.text);
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(theme.grid)
        .axis_style(theme.grid)
        .label_style(small)
        .x_desc("endpoints")
        .x_labels(6)
        .y_labels(7)
        .x_label_formatter(&|count| thousands(*count))
        .y_label_formatter(&|value| thousands(*value))
        .draw()?;
    for ((number, figures), colour) in lines.iter().enumerate().zip(&theme.lines) {
        let at = |figure: &&Figure| (f64::from(figure.endpoints.unwrap_or(0)), figure.estimate.median);
        let points: Vec<(f64, f64)> = figures.iter().map(at).collect();
        chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(2)))?;
        for point in points {
            whole.draw(&mark(number, chart.backend_coord(&point), *colour))?;
        }
    }
    Ok(())
}

/// The power of ten below or above.
fn decade(value: f64, round: fn(f64) -> f64) -> f64 {
    10_f64.powf(round(value.log10()))
}

fn thousands(value: f64) -> String {
    let whole = format!("{value}");
    if value < 1000.0 || value.fract() != 0.0 {
        return whole;
    }
    let digits = whole.len();
    let with_commas = whole.chars().enumerate().map(|(at, digit)| {
        let comma = if at > 0 && (digits - at).is_multiple_of(3) {
            ","
        } else {
            ""
        };
        format!("{comma}{digit}")
    });
    with_commas.collect()
}

/// On what it was measured, and how far it can be trusted.
fn source(report: &Report) -> String {
    let trial = if report.quick { "; a trial of few rounds" } else { "" };
    let doubtful = if report.warnings.is_empty() {
        ""
    } else {
        "; the run warned that figures are doubtful"
    };
    format!(
        "Linux {}, {} × {}{trial}{doubtful}",
        report.machine.kernel, report.machine.processors, report.machine.processor
    )
}

/// A mark of a line's own.
fn mark<'a, DB: DrawingBackend + 'a>(
    number: usize,
    at: (i32, i32),
    colour: RGBColor,
) -> DynElement<'a, DB, (i32, i32)> {
    match number {
        0 => Circle::new(at, 5, colour.filled()).into_dyn(),
        1 => TriangleMarker::new(at, 7, colour.filled()).into_dyn(),
        2 => Rectangle::new([(at.0 - 4, at.1 - 4), (at.0 + 4, at.1 + 4)], colour.filled()).into_dyn(),
        3 => Cross::new(at, 5, colour.stroke_width(2)).into_dyn(),
        4 => Circle::new(at, 5, colour.stroke_width(2)).into_dyn(),
        _ => Circle::new(at, 2, colour.filled()).into_dyn(),
    }
}

/// Who is who, and what the figures are of.
fn draw_legend(report: &Report, theme: &Theme, area: &Area<'_>) -> Drawn {
    let text = (FONT, 15)
        .into_font()
        .color(&theme.text)
        .pos(Pos::new(HPos::Left, VPos::Center));
    let columns = 3;
    for ((number, who), colour) in LINES.iter().enumerate().zip(&theme.lines) {
        let (column, row) = (i32::try_from(number % columns)?, i32::try_from(number / columns)?);
        let (x, y) = (60 + column * 310, 22 + row * 30);
        area.draw(&PathElement::new([(x, y), (x + 36, y)], colour.stroke_width(2)))?;
        area.draw(&mark(number, (x + 18, y), *colour))?;
        area.draw(&Text::new(*who, (x + 46, y), text.clone()))?;
    }
    area.draw(&Text::new(source(report), (60, 92), text))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_apart() {
        let all = [0.5, 1.0, 100.0, 1000.0, 10_000.0, 100_000.0, 1_000_000.0].map(thousands);
        assert_eq!(all.join(" "), "0.5 1 100 1,000 10,000 100,000 1,000,000");
    }
}
