//! Plots as SVG, for a page that needs nothing else: no script, no file beside it.

use std::fmt::{Display, Write as _};

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 240.0;
/// Room for the labels of the axes.
const LEFT: f64 = 64.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 34.0;

/// Values over time.
pub(super) struct Series<'a> {
    /// What they are.
    pub(super) name: &'a str,
    /// The CSS class that colours them.
    pub(super) class: &'a str,
    /// One for each time.
    pub(super) values: Vec<f64>,
}

/// How values are written at an axis.
#[derive(Clone, Copy)]
pub(super) enum Unit {
    /// As they are.
    Plain,
    /// As bytes.
    Bytes,
}

/// Lines over time; `marks` are moments with a name.
pub(super) fn lines(
    label: &str,
    times: &[f64],
    series: &[Series<'_>],
    unit: Unit,
    marks: &[(f64, String)],
) -> String {
    let most = series.iter().flat_map(|series| &series.values).copied().fold(0.0, f64::max);
    let frame = Frame::new(times.last().copied().unwrap_or_default(), most, unit);
    let mut body = frame.axes();
    for series in series {
        let points: Vec<_> = times.iter().zip(&series.values).map(|(x, y)| frame.point(*x, *y)).collect();
        let _ = write!(body, r#"<polyline class="line {}" points="{}"/>"#, series.class, points.join(" "));
    }
    body += &frame.marks(marks);
    figure(label, &body, HEIGHT) + &legend(series)
}

/// Areas on top of each other, over time: the first is at the bottom.
pub(super) fn stack(label: &str, times: &[f64], series: &[Series<'_>], marks: &[(f64, String)]) -> String {
    let sum = |index: usize| series.iter().map(|series| series.values[index]).sum::<f64>();
    let most = (0..times.len()).map(sum).fold(0.0, f64::max);
    let frame = Frame::new(times.last().copied().unwrap_or_default(), most, Unit::Plain);
    let mut body = String::new();
    let mut below = vec![0.0; times.len()];
    for series in series {
        let above: Vec<_> = below.iter().zip(&series.values).map(|(below, value)| below + value).collect();
        let there = times.iter().zip(&above).map(|(x, y)| frame.point(*x, *y));
        let back = times.iter().zip(&below).rev().map(|(x, y)| frame.point(*x, *y));
        let points: Vec<_> = there.chain(back).collect();
        let _ = write!(
            body,
            r#"<polygon class="area {}" points="{}"><title>{}</title></polygon>"#,
            series.class,
            points.join(" "),
            escape(series.name)
        );
        below = above;
    }
    body += &frame.axes();
    body += &frame.marks(marks);
    figure(label, &body, HEIGHT) + &legend(series)
}

/// Columns side by side, each with what stands below it.
pub(super) fn columns(label: &str, columns: &[(String, usize)]) -> String {
    let most = columns.iter().map(|(_, count)| *count).max().unwrap_or_default();
    let frame = Frame { x: columns.len() as f64, y: ceiling(most as f64), unit: Unit::Plain };
    let mut body = frame.levels();
    // Labels that would touch are left out.
    let every = columns.len().div_ceil(16).max(1);
    for (index, (name, count)) in columns.iter().enumerate() {
        let (left, right) = (frame.left(index as f64 + 0.1), frame.left(index as f64 + 0.9));
        let top = frame.top(*count as f64);
        let _ = write!(
            body,
            r#"<rect class="area applied" x="{left:.1}" y="{top:.1}" width="{:.1}" height="{:.1}"><title>{}: {count}</title></rect>"#,
            right - left,
            frame.top(0.0) - top,
            escape(name)
        );
        if index % every == 0 {
            let middle = f64::midpoint(left, right);
            let _ = write!(
                body,
                r#"<text x="{middle:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
                HEIGHT - BOTTOM + 16.0,
                escape(name)
            );
        }
    }
    figure(label, &body, HEIGHT)
}

/// A bar of parts of a whole, each with its CSS class; for a table.
pub(super) fn parts(whole: f64, parts: &[(&str, f64)]) -> String {
    let mut bar = String::from(
        r#"<svg class="bar" viewBox="0 0 200 12" preserveAspectRatio="none" aria-hidden="true">"#,
    );
    let _ = write!(bar, r#"<rect class="area rest" width="200" height="12"/>"#);
    let mut left = 0.0;
    for (class, part) in parts.iter().filter(|(_, part)| *part > 0.0) {
        let width = part / whole.max(f64::MIN_POSITIVE) * 200.0;
        let _ = write!(bar, r#"<rect class="area {class}" x="{left:.2}" width="{width:.2}" height="12"/>"#);
        left += width;
    }
    bar + "</svg>"
}

/// Text as it may stand in HTML, between tags and in quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A number of bytes, for people.
pub(super) fn bytes(count: f64) -> String {
    match count {
        _ if count < 1e3 => format!("{count:.0} B"),
        _ if count < 1e6 => format!("{:.1} KB", count / 1e3),
        _ if count < 1e9 => format!("{:.1} MB", count / 1e6),
        _ => format!("{:.2} GB", count / 1e9),
    }
}

fn figure(label: &str, body: &str, height: f64) -> String {
    let label = escape(label);
    format!(
        r#"<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{body}</svg>"#
    )
}

fn legend(series: &[Series<'_>]) -> String {
    let key = |series: &Series<'_>| {
        format!(
            r#"<span><svg class="key" viewBox="0 0 10 10" aria-hidden="true"><rect class="area {}" width="10" height="10"/></svg>{}</span>"#,
            series.class,
            escape(series.name)
        )
    };
    format!(r#"<p class="legend">{}</p>"#, series.iter().map(key).collect::<String>())
}

/// The part of a plot that values are drawn in.
struct Frame {
    /// The greatest value of the horizontal axis.
    x: f64,
    /// That of the vertical one.
    y: f64,
    unit: Unit,
}

impl Frame {
    fn new(x: f64, y: f64, unit: Unit) -> Frame {
        Frame { x: x.max(0.001), y: ceiling(y), unit }
    }

    fn left(&self, x: f64) -> f64 {
        LEFT + x / self.x * (WIDTH - LEFT - RIGHT)
    }

    fn top(&self, y: f64) -> f64 {
        TOP + (1.0 - y / self.y) * (HEIGHT - TOP - BOTTOM)
    }

    fn point(&self, x: f64, y: f64) -> String {
        format!("{:.1},{:.1}", self.left(x), self.top(y))
    }

    fn axes(&self) -> String {
        let mut axes = self.levels();
        let step = step(self.x);
        let mut x = 0.0;
        while x <= self.x * 1.0001 {
            let (left, bottom) = (self.left(x), HEIGHT - BOTTOM + 16.0);
            let _ = write!(
                axes,
                r#"<text x="{left:.1}" y="{bottom}" text-anchor="middle">{} s</text>"#,
                plain(x)
            );
            x += step;
        }
        axes
    }

    fn levels(&self) -> String {
        let mut levels = String::new();
        let step = step(self.y);
        let mut y = 0.0;
        while y <= self.y * 1.0001 {
            let top = self.top(y);
            let text = match self.unit {
                Unit::Plain => plain(y).to_string(),
                Unit::Bytes => bytes(y),
            };
            let _ = write!(
                levels,
                r#"<line class="grid" x1="{LEFT}" x2="{}" y1="{top:.1}" y2="{top:.1}"/><text x="{}" y="{:.1}" text-anchor="end">{text}</text>"#,
                WIDTH - RIGHT,
                LEFT - 6.0,
                top + 4.0
            );
            y += step;
        }
        levels
    }

    fn marks(&self, marks: &[(f64, String)]) -> String {
        let mut body = String::new();
        for (x, name) in marks.iter().filter(|(x, _)| *x <= self.x) {
            let left = self.left(*x);
            // Near the end there is no room to its right.
            let (anchor, beside) = if left > WIDTH * 0.8 { ("end", -4.0) } else { ("start", 4.0) };
            let _ = write!(
                body,
                r#"<line class="mark" x1="{left:.1}" x2="{left:.1}" y1="{TOP}" y2="{}"/><text class="mark" x="{:.1}" y="{}" text-anchor="{anchor}">{}</text>"#,
                HEIGHT - BOTTOM,
                left + beside,
                TOP + 10.0,
                escape(name)
            );
        }
        body
    }
}

/// The distance of an axis's labels: 1, 2 or 5 times a power of ten, for about five of them.
fn step(most: f64) -> f64 {
    let rough = (most / 5.0).max(f64::MIN_POSITIVE);
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().find(|step| step * power >= rough).unwrap_or(10.0);
    step * power
}

/// Where an axis ends, for values up to `most`.
fn ceiling(most: f64) -> f64 {
    if most <= 0.0 {
        return 1.0;
    }
    let step = step(most);
    (most / step).ceil() * step
}

/// A number at an axis, without the noise of floating point.
fn plain(number: f64) -> impl Display {
    (number * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_numbers_and_room_for_every_value() {
        for most in [0.0, 0.7, 1.0, 7.0, 99.0, 10_000.0, 655_360_000.0] {
            let end = ceiling(most);
            assert!(end >= most && end <= most.max(1.0) * 1.5, "{most}: {end}");
            assert!((1.0..=8.0).contains(&(end / step(end))), "{most}: {end}");
        }
        assert_eq!((step(10_000.0), step(60.0)), (2000.0, 20.0));
    }

    #[test]
    fn what_devices_say_cannot_break_out_of_the_page() {
        assert_eq!(escape("<b a='\"'>&\u{7}"), "&lt;b a=&#39;&quot;&#39;&gt;&amp; ");
        let series = [Series { name: "</svg><script>", class: "applied", values: vec![1.0, 2.0] }];
        let plot = stack("\"><script>", &[0.0, 1.0], &series, &[(0.5, "<i>".to_owned())]);
        assert!(!plot.contains("<script>") && !plot.contains("<i>"), "{plot}");
    }

    #[test]
    fn nothing_and_a_single_moment_make_a_plot_too() {
        for times in [&[][..], &[0.0][..]] {
            let series = [Series { name: "a", class: "applied", values: vec![0.0; times.len()] }];
            let plot = lines("a", times, &series, Unit::Bytes, &[]) + &stack("a", times, &series, &[]);
            assert!(!plot.contains("NaN") && !plot.contains("inf"), "{plot}");
        }
        assert!(!columns("a", &[]).contains("NaN") && !parts(0.0, &[("applied", 0.0)]).contains("NaN"));
    }
}
